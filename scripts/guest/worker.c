/*
 * Writes memory at a set rate and checks every page that it wrote, so that one lost or stale page is
 * seen; and watches the clocks.
 *
 * A page holds its number, its generation, filling that follows from both, and a checksum. The
 * generation it should have is kept outside of it. "Busy" pages (microvm.ws, 32M) are checked and
 * written anew in turn, microvm.rate (20M) bytes a second; "still" pages (microvm.still, 8M) are
 * written once and checked forever: the ones that a migration sends only once.
 *
 * Status: /run/worker.json, five times a second; the first errors also go to the console.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define SLICE_NS 5000000
#define STILL_PER_SLICE 4
#define STATUS_NS 200000000
#define REPORTED_ERRORS 10

struct region {
	uint64_t (*pages)[WORDS];
	uint64_t *generation;
	uint64_t count, next, checked, written;
};

static atomic_uint_fast64_t errors;
static char first_error[200];
static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 1, 2))) static void report(const char *format, ...)
{
	char text[sizeof first_error];
	va_list args;
	uint64_t nth = atomic_fetch_add(&errors, 1);

	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	pthread_mutex_lock(&error_lock);
	if (!*first_error)
		strcpy(first_error, text);
	if (nth < REPORTED_ERRORS)
		dprintf(STDERR_FILENO, "GUEST-ERROR %s\n", text);
	pthread_mutex_unlock(&error_lock);
}

/* --- memory --- */

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	return x ^ x >> 27;
}

static void write_page(struct region *region, uint64_t number)
{
	uint64_t *page = region->pages[number];
	uint64_t generation = ++region->generation[number];
	uint64_t value = mix(number << 32 ^ generation), sum = 0;

	page[0] = number;
	page[1] = generation;
	for (size_t i = 2; i < WORDS - 1; i++) {
		value += UINT64_C(0x9e3779b97f4a7c15);
		page[i] = value;
		sum = (sum << 1 | sum >> 63) ^ value;
	}
	page[WORDS - 1] = sum;
	region->written++;
}

static void check_page(struct region *region, const char *name, uint64_t number)
{
	const uint64_t *page = region->pages[number];
	uint64_t generation = region->generation[number];
	uint64_t value = mix(number << 32 ^ generation), sum = 0;
	size_t wrong = 0;

	for (size_t i = WORDS - 2; i >= 2; i--)
		if (page[i] != value + (i - 1) * UINT64_C(0x9e3779b97f4a7c15))
			wrong++;
	for (size_t i = 2; i < WORDS - 1; i++)
		sum = (sum << 1 | sum >> 63) ^ page[i];
	region->checked++;
	if (page[0] != number || page[1] != generation || wrong || page[WORDS - 1] != sum)
		report("memory: %s page %llu generation %llu holds page %llu generation %llu, %zu words wrong, checksum %s",
		       name, (unsigned long long)number, (unsigned long long)generation,
		       (unsigned long long)page[0], (unsigned long long)page[1], wrong,
		       page[WORDS - 1] == sum ? "right" : "wrong");
}

static void check_next(struct region *region, const char *name)
{
	for (int i = 0; i < STILL_PER_SLICE && region->count; i++) {
		check_page(region, name, region->next);
		region->next = (region->next + 1) % region->count;
	}
}

static void *map(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED) {
		dprintf(STDERR_FILENO, "GUEST-ERROR worker: no memory for %zu bytes\n", bytes);
		exit(1);
	}
	return memory;
}

static void fill(struct region *region, uint64_t bytes)
{
	region->count = bytes / PAGE;
	if (!region->count)
		return;
	region->pages = map(region->count * PAGE);
	region->generation = map(region->count * sizeof *region->generation);
	for (uint64_t i = 0; i < region->count; i++)
		write_page(region, i);
}

/* --- clocks --- */

struct watch {
	int id;
	const char *name;
	_Atomic int64_t latest;
	atomic_uint_fast64_t backwards;
	_Atomic int64_t worst_back_ns, gap_max_ns, gap_max_at_ns;
};

static struct watch watches[] = {
	{.id = CLOCK_MONOTONIC, .name = "monotonic"},
	{.id = CLOCK_REALTIME, .name = "realtime"},
	{.id = CLOCK_BOOTTIME, .name = "boottime"},
};

/* A reading must not be before one that had ended, on whatever CPU, when it began. */
static void sample(struct watch *watch)
{
	int64_t before = atomic_load(&watch->latest), now = now_ns(watch->id), step = now - before;

	if (before && step < 0) {
		atomic_fetch_add(&watch->backwards, 1);
		if (-step > atomic_load(&watch->worst_back_ns))
			atomic_store(&watch->worst_back_ns, -step);
		report("clock: %s went back by %lld ns", watch->name, (long long)-step);
		/* Reported; go on from here, so that one step back is one error. */
		atomic_store(&watch->latest, now);
		return;
	}
	if (before && step > atomic_load(&watch->gap_max_ns)) {
		atomic_store(&watch->gap_max_ns, step);
		atomic_store(&watch->gap_max_at_ns, now);
	}
	while (now > before && !atomic_compare_exchange_weak(&watch->latest, &before, now))
		;
}

static void *watch_clocks(void *cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
	for (;;) {
		for (size_t i = 0; i < sizeof watches / sizeof *watches; i++)
			sample(&watches[i]);
		usleep(2000);
	}
	return NULL;
}

/* --- status --- */

static void write_status(const struct region *busy, const struct region *still, uint64_t rate, uint64_t ticks)
{
	FILE *file = fopen(WORKER_STATUS ".new", "w");

	if (!file)
		return;
	pthread_mutex_lock(&error_lock);
	fprintf(file, "{\"updated_monotonic_ns\":%lld,\"ticks\":%llu,\"errors\":%llu,\"first_error\":\"%s\","
		"\"rate_bytes\":%llu,", (long long)now_ns(CLOCK_MONOTONIC), (unsigned long long)ticks,
		(unsigned long long)errors, first_error, (unsigned long long)rate);
	pthread_mutex_unlock(&error_lock);
	fprintf(file, "\"busy\":{\"pages\":%llu,\"written\":%llu,\"checked\":%llu},"
		"\"still\":{\"pages\":%llu,\"checked\":%llu},\"clocks\":{",
		(unsigned long long)busy->count, (unsigned long long)busy->written, (unsigned long long)busy->checked,
		(unsigned long long)still->count, (unsigned long long)still->checked);
	for (size_t i = 0; i < sizeof watches / sizeof *watches; i++)
		fprintf(file, "%s\"%s\":{\"backwards\":%llu,\"worst_back_ns\":%lld,\"gap_max_ns\":%lld,"
			"\"gap_max_at_ns\":%lld}", i ? "," : "", watches[i].name,
			(unsigned long long)watches[i].backwards, (long long)watches[i].worst_back_ns,
			(long long)watches[i].gap_max_ns, (long long)watches[i].gap_max_at_ns);
	fprintf(file, "}}\n");
	if (!fclose(file))
		rename(WORKER_STATUS ".new", WORKER_STATUS);
}

int worker_main(void)
{
	uint64_t rate = cmdline_bytes("microvm.rate", 20 << 20);
	struct region busy = {0}, still = {0};
	int64_t begun, reported = 0;
	uint64_t ticks = 0, done = 0;
	pthread_t thread;

	write_status(&busy, &still, rate, 0); /* filling takes a while */
	fill(&busy, cmdline_bytes("microvm.ws", 32 << 20));
	fill(&still, cmdline_bytes("microvm.still", 8 << 20));
	for (long cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++)
		pthread_create(&thread, NULL, watch_clocks, (void *)cpu);
	begun = now_ns(CLOCK_MONOTONIC);
	for (;; ticks++) {
		int64_t now = now_ns(CLOCK_MONOTONIC);
		/* What is due by now; after a pause, no more than one slice is made up for. */
		uint64_t due = (uint64_t)((now - begun) / 1e9 * rate / PAGE);

		if (due > done + rate / PAGE * SLICE_NS / 1000000000 * 4 + 4) {
			begun = now;
			due = done = 0;
		}
		for (; done < due && busy.count; done++) {
			check_page(&busy, "busy", busy.next);
			write_page(&busy, busy.next);
			busy.next = (busy.next + 1) % busy.count;
		}
		check_next(&still, "still");
		if (!rate)
			check_next(&busy, "busy");
		if (now - reported >= STATUS_NS) {
			write_status(&busy, &still, rate, ticks);
			reported = now;
		}
		usleep(SLICE_NS / 1000);
	}
}
