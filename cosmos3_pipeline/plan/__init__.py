"""What a composition will do, from arithmetic alone. Imports no torch."""
