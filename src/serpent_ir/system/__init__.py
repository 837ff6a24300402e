"""What this machine offers: devices, memory, processes, files that are written whole, CUDA graph capture."""
