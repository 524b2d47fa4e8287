"""What a team deploys, and the same stack as processes of one machine (native/)."""
