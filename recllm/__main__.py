"""`python -m recllm`: the command line."""

from recllm.cli import main

if __name__ == "__main__":
    main()
