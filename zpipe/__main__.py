"""`python -m zpipe`, which is what torchrun starts: `torchrun --nproc-per-node 8 -m zpipe train-vit ...`."""

from zpipe.cli import main

if __name__ == "__main__":
    main()
