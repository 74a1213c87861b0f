"""`python -m perceiver_train`: the command `perceiver`, also in a folder that contains another `perceiver`."""

from perceiver_train import main

if __name__ == "__main__":
    main()
