"""From files of examples to batches: options, formats, template and render, dataset (cache), pack, loader, stream."""
