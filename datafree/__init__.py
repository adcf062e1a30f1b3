"""What two or more scripts share: losses, augmentation, checkpoints, logs, the runtime."""
