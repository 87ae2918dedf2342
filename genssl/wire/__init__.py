"""What client and server share beside the stubs: settings of the channel, refusals."""
