"""Images and sound: files as users have them, frozen encoders, and features cached on disk."""
