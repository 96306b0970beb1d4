@echo off
rem Shared by the launch_*.bat beside it, which set CARD and VRAM. Arguments are flags of generate.py and win.
set "MODEL=Wan-AI/Wan2.1-T2V-1.3B"
set "SIZE=480p"
if %VRAM:~0,-2% GEQ 40 set "MODEL=Wan-AI/Wan2.2-T2V-A14B"
if %VRAM:~0,-2% GEQ 40 set "SIZE=720p"
if not defined CKPT set "CKPT=%MODEL%"
if exist "%CKPT%\" for %%F in ("%CKPT%") do set "CKPT=%%~fF"
cd /d "%~dp0.."
if not defined PYTHON if exist ".venv\Scripts\python.exe" set "PYTHON=.venv\Scripts\python.exe"
if not defined PYTHON set "PYTHON=python"
set START="%PYTHON%" generate_optimized.py --preset %CARD% --vram_budget %VRAM% --ckpt_dir "%CKPT%" --size %SIZE%
if "%~1"=="" goto ask
%START% %*
exit /b %ERRORLEVEL%

:ask
set "TEXT="
set /p "TEXT=Prompt: "
rem Only now, so that a prompt may hold what the shell would read as its own; double quotes cannot be passed on.
setlocal EnableDelayedExpansion
if defined TEXT set TEXT=!TEXT:"='!
!START! --prompt "!TEXT!"
pause
