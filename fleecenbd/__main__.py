"""``python -m fleecenbd``."""

from fleecenbd.cli.main import main

main()
