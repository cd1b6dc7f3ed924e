"""Everything that touches EasyEdit, the host; nothing here imports it by itself."""
