"""The command easyedit-moe, a file per subcommand."""
