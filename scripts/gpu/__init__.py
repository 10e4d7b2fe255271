"""What scripts/run_gpu.py and scripts/check_gpu.py are made of: stages, archives, checks."""
