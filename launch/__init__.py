"""Starting and watching runs: the command line, and ranks on this machine."""
