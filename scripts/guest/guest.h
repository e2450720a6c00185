/* The test guest's own programs: one static binary, which does what the name says it is called by. */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

#define WORKER_STATUS "/run/worker.json"

int worker_main(void);
int echo_main(void);
int status_main(void);
int index_main(void);

/* Nanoseconds of a clock (CLOCK_…). */
int64_t now_ns(int clock);

/* Reads a file (cut to size - 1 bytes) without its last newline; an empty string if it cannot be read. */
void slurp(const char *path, char *text, size_t size);

/* The bytes that WORD=32M on the kernel's command line means, or `otherwise`. */
uint64_t cmdline_bytes(const char *word, uint64_t otherwise);

#endif
