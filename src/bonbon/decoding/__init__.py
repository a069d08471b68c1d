"""Best-of-n at inference time: ways of spending n draws on one good answer."""
