"""The embedded world "creatures", a leaf: drawing, captions, base model, judges, trial, assets; nothing else imports it."""
