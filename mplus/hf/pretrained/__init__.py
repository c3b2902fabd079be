"""Save and load wrapped decoders, from folders and from the Hub."""
