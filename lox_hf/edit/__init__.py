"""The edit: of one tensor, of all of them, in batches on a device, in float8, in pieces over processes, and back."""
