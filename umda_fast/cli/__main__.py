"""`python -m umda_fast.cli`, which is also how torchrun starts the command."""

from umda_fast.cli import main

main()
