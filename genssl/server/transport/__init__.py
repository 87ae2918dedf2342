"""Messages on their way in and out of a server, within bounds."""
