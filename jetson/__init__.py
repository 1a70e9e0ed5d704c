"""What the device is: targets, boards, GPU, memory."""
