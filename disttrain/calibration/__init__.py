"""What this machine can do, measured: `disttrain calibrate` times products, passes over memory, operators and links."""
