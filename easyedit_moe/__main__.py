"""``python -m easyedit_moe``: the command line."""

from easyedit_moe.commands.app import main

if __name__ == "__main__":
    main()
