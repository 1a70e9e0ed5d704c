"""Jobs, the batch they share, what is kept of them: the service behind its doors."""
