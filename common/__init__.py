"""The ground floor: errors, files, text. Every package but `zclip` may import it; it imports none of them."""
