"""`python -m mmalign.cli`."""

from . import main

main()
