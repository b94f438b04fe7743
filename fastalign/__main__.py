"""`python -m fastalign ...`, the form that `torchrun` launches."""

from fastalign.cli.main import console

console()
