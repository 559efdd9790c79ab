"""What fine-tuning an adapter costs, before anything is run: operations, bytes, memory and time, part by part."""
