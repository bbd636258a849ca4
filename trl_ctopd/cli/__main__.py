"""`python -m trl_ctopd.cli`, and `accelerate launch -m trl_ctopd.cli`, which needs a module instead of a command."""

from . import main


main()
