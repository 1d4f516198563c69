"""Import this, and transformers opens pruned models too (and composed ones): it knows every class that headlab loads."""

from . import loading as loading
