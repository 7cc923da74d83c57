"""What runs on NVIDIA GPUs. Nothing here is imported, and no extension loaded, before a CUDA tensor arrives."""
