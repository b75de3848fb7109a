"""What is known of this machine, as plain dicts: hardware, memory, power, disks, self-tests, hazards."""
