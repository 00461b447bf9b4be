"""`python -m proxsparse`, for launchers: torchrun --nproc-per-node 8 -m proxsparse prune ..."""

from proxsparse.cli import main

main()
