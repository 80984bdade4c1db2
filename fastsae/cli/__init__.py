"""The command line: main.py dispatches, options.py says what each command takes, commands.py what it does."""
