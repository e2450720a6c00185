//! The machine under the guest: entry, memory, clock, interrupts, ports. The only place, with the network card's buffers
//! (`net::device`), where the guest is `unsafe`.

#![allow(unsafe_code)] // It is the hardware: registers, page tables, memory that nobody allocated.

pub mod apic;
pub mod boot_info;
pub mod clock;
pub mod interrupts;
pub mod memory;
pub mod port;
pub mod power;
pub mod serial;

use core::arch::global_asm;

global_asm!(include_str!("../boot.s"), options(att_syntax));

// The compiler calls these by name, and there is no C library to bring them. String instructions are as fast as
// anything on CPUs of this century, and never touch the vector registers.
global_asm!(
    ".globl memcpy, memmove, memset, memcmp, bcmp",
    "memcpy:",
    "    mov rax, rdi",
    "    mov rcx, rdx",
    "    rep movsb",
    "    ret",
    "memmove:",
    "    mov rax, rdi",
    "    mov rcx, rdx",
    "    mov r8, rdi",
    "    sub r8, rsi",
    "    cmp r8, rdx", // Unsigned: below the length only when the destination starts inside the source.
    "    jb 2f",
    "    rep movsb",
    "    ret",
    "2:  lea rdi, [rdi + rdx - 1]",
    "    lea rsi, [rsi + rdx - 1]",
    "    std",
    "    rep movsb",
    "    cld",
    "    ret",
    "memset:",
    "    mov r8, rdi",
    "    mov eax, esi",
    "    mov rcx, rdx",
    "    rep stosb",
    "    mov rax, r8",
    "    ret",
    "memcmp:",
    "bcmp:",
    "    xor ecx, ecx",
    "2:  cmp rcx, rdx",
    "    je 3f",
    "    movzx eax, byte ptr [rdi + rcx]",
    "    movzx r8d, byte ptr [rsi + rcx]",
    "    inc rcx",
    "    sub eax, r8d",
    "    je 2b",
    "    ret",
    "3:  xor eax, eax",
    "    ret",
);

/// What ring 0 knows at its end and ring 3 at its start: see `ring3_entry` in `boot.s`.
///
/// # Safety
///
/// Called once, by `boot.s`, with the address of `hvm_start_info` as the VMM gave it.
#[unsafe(no_mangle)]
unsafe extern "C" fn ring3_main(start_info: u32, kvm_clock_msr: u32) -> ! {
    interrupts::init();
    crate::run(u64::from(start_info), kvm_clock_msr != 0)
}
