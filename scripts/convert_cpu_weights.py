"""`kt-sft convert` under the name and with the flags of a script; see `kt-sft convert --help`."""

import sys

from kt_sft.cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]])
