"""What a strategy takes, in closed form: memory of a device and of a host, time of a step. Pure arithmetic."""
