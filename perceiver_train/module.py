"""`python -P -m perceiver_train.module MODULE [ARGUMENT]...`: run one of our modules as a program."""

import runpy
import sys

from perceiver_train import pin

if __name__ == "__main__":
    pin()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
