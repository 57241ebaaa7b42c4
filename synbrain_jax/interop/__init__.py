"""What the released PyTorch system wrote and printed, read and computed without PyTorch."""
