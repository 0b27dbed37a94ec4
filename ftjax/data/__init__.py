"""From files of examples to batches: formats, template, render, dataset (the cache), pack, loader, stream."""
