"""python -m llaisys: the llaisys command."""

import sys

from .cli import main

sys.exit(main())
