"""The shared base: errors, files, settings, text. Every package but `zclip` may import it; it imports none of them."""
