"""Where a parameter's entries live, who owns a block, and how pieces travel between ranks."""
