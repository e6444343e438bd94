"""What every stage needs: errors, files, stage directories, configuration, class lists, probes, the console."""
