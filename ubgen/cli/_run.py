"""How every command ends. It lies beside `UserError`, since programs below the commands end so too."""

from ubgen.errors import run as run
