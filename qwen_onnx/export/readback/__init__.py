"""What a finished graph holds, read from the graph itself."""
