"""From a stack of gradients to a stack of updates: Shampoo, SOAP, KL-Shampoo, AdamW's moments."""
