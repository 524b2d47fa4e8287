"""The whole stack without containers: real servers as processes of this machine, on loopback."""
