"""How much a head matters: by gradients, or by removing it."""
