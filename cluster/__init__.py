"""What decides where things run and how many: configuration, placement, routing between instances."""
