"""Videos over HTTP: nothing here yet."""
