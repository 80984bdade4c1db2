"""The command line: main.py dispatches, options.py defines each command's options, commands.py runs it."""
